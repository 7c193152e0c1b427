"""What a phase is called, in the words of hospitals, and by seconds after the injection."""

from __future__ import annotations

from pathlib import Path

import dce
import pytest
from pydicom import Dataset

from dicom_node.pixels import dynamic
from dicom_node.pixels.dynamic import Plan, Rules
from dicom_node.pixels.dynamic_names import words_of
from dicom_node.result import Refusal


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ("t1_vibe_fs_tra_nativ", {"pre"}), ("Ax LAVA PRE +C", {"pre"}), ("T1 sans injection", {"pre"}),
        ("肝脏平扫", {"pre"}), ("VIBE_ART1", {"arterial"}), ("eTHRIVE late arterial", {"arterial"}),
        ("t1 spätarteriell", {"arterial"}), ("phase artérielle tardive", {"arterial"}), ("动脉晚期", {"arterial"}),
        ("動脈相", {"arterial"}), ("LAVA portal venous 70s", {"portal venous"}), ("t1_portalvenös", {"portal venous"}),
        ("fase portale", {"portal venous"}), ("门静脉期", {"portal venous"}), ("ven", {"portal venous"}),
        ("Equilibrium 3min", {"delayed"}), ("Spätphase", {"delayed"}), ("延迟期", {"delayed"}),
        ("hepatobiliary 20 min delayed", {"hepatobiliary"}), ("肝胆期", {"hepatobiliary"}),
        ("t1_vibe_fs_tra_dyn", set()), ("fase del higado", set()), ("Starter party", set()),
        ("pre / art", {"pre", "arterial"}),
    ],
)  # fmt: skip
def test_series_descriptions_in_several_languages(description: str, expected: set[str]) -> None:
    assert words_of(description) == expected


def test_a_sites_own_word() -> None:
    assert words_of("TRUE FISP X7", Rules(words={"arterial": ("fisp",)})) == {"arterial"}


def planned(
    folder: Path, seconds: tuple[float, ...], words: tuple[str, ...], rules: Rules | None = None, **values: object
) -> Plan:
    d = dce.Dce()

    def mark(ds: Dataset, p: int, s: int) -> None:
        ds.AcquisitionTime, ds.SeriesDescription = dce.tm(d.injection + seconds[p]), words[p]
        ds.SpecificCharacterSet = "ISO_IR 192"
        for key, value in values.items():
            setattr(ds, key, value)

    found = dynamic.plan(dce.study(folder, d.datasets(mark, one_series=False)), rules)
    assert isinstance(found, Plan), found
    return found


def test_times_between_the_windows_name_nothing(tmp_path: Path) -> None:
    found = planned(tmp_path, (-30, 8, 52, 111), ("t1",) * 4)
    assert found.names == ("pre", "phase 2", "phase 3", "phase 4")
    assert [p.named_by for p in found.phases] == ["time", "", "", ""]


def test_of_several_phases_in_one_window_the_latest_bears_the_name_unless_another_is_called_so(tmp_path: Path) -> None:
    found = planned(tmp_path / "a", (-30, 20, 35, 70), ("t1",) * 4)
    assert found.names == ("pre", "phase 2", "arterial", "portal venous")
    assert found.notes["several phases of one name"] == "arterial: the latest"
    found = planned(tmp_path / "b", (-30, 20, 35, 70), ("t1", "art", "t1", "t1"))
    assert found.names == ("pre", "arterial", "phase 3", "portal venous")


def test_late_images_are_hepatobiliary_only_after_gadoxetate(tmp_path: Path) -> None:
    late = (-30, 25, 70, 1200)
    assert planned(tmp_path / "a", late, ("t1",) * 4).names[3] == "phase 4"
    agent = planned(tmp_path / "b", late, ("t1",) * 4, ContrastBolusAgent="Primovist 0.25 mmol/ml")
    assert agent.names[3] == "hepatobiliary"


def test_without_a_bolus_start_the_arterial_phase_gives_the_zero_time(tmp_path: Path) -> None:
    found = planned(tmp_path / "a", (-20, 25, 70, 180), ("nativ", "art", "t1", "t1"), ContrastBolusStartTime="")
    assert found.names == dce.NAMES
    assert found.notes["zero time"] == "25 s before the first arterial phase"
    unknown = planned(tmp_path / "b", (-20, 25, 70, 180), ("nativ", "t1", "t1", "t1"), ContrastBolusStartTime="")
    assert unknown.names == ("pre", "phase 2", "phase 3", "phase 4")
    assert unknown.notes["zero time"] == "first phase" and unknown.phases[1].seconds == pytest.approx(45.0)


def test_a_bolus_start_of_another_hour_is_not_believed(tmp_path: Path) -> None:
    found = planned(tmp_path, (-20, 25, 70, 180), ("t1",) * 4, ContrastBolusStartTime="073000")
    assert found.notes["zero time"] == "first phase" and found.names[1] == "phase 2"


def test_the_contrast_attribute_names_a_phase_and_may_not_contradict_its_time(tmp_path: Path) -> None:
    d = dce.Dce()

    def of(kinds: tuple[str, ...]) -> Plan | Refusal:
        def mark(ds: Dataset, group: Dataset, p: int, s: int) -> None:
            group.FrameContentSequence[0].TemporalPositionIndex = p + 1
            group.FrameContentSequence[0].FrameAcquisitionDateTime = "20260301" + dce.tm(d.time(p))
            usage = dce.item(ContrastBolusAgentNumber=1, ContrastBolusAgentAdministered="YES" if p else "NO")
            if kinds[p]:
                usage.ContrastBolusAgentPhase = kinds[p]
            group.ContrastBolusUsageSequence = [usage]

        return dynamic.plan(dce.study(tmp_path / kinds[1], [d.enhanced(mark)]))

    found = of(("", "ARTERIAL", "DYNAMIC", "DELAYED"))
    assert isinstance(found, Plan) and found.names == dce.NAMES
    assert [p.named_by for p in found.phases] == ["attribute", "attribute", "time", "attribute"]
    assert str(of(("", "DELAYED", "", ""))) == "PHASE_LABEL_CONFLICT(phase 2, delayed, at 25 s)"


def test_a_site_names_the_phases_by_its_own_windows_words_and_delay_and_the_notes_say_so(tmp_path: Path) -> None:
    seconds, plain = (-20.0, 25.0, 70.0, 180.0), ("t1",) * 4
    assert planned(tmp_path / "a", seconds, plain).names == dce.NAMES
    late = Rules(windows={"arterial": (15, 65), "portal venous": (75, 110)})
    found = planned(tmp_path / "b", seconds, plain, late)
    assert found.names == ("pre", "arterial", "phase 3", "delayed")
    said = "arterial 15 to 65 s; portal venous 75 to 110 s"
    assert found.notes["phase rules of the site"] == said
    own = Rules(words={"portal venous": ("zweite",)}, arm_to_liver_seconds=20.0)
    words = ("nativ", "art", "Zweite_2", "t1")
    found = planned(tmp_path / "c", seconds, words, own, ContrastBolusStartTime="")
    assert found.names == dce.NAMES and found.phases[2].named_by == "description"
    assert found.notes["zero time"] == "20 s before the first arterial phase"
    assert found.notes["phase rules of the site"] == "portal venous also called zweite; arm to liver 20 s"
    assert "phase rules of the site" not in planned(tmp_path / "d", seconds, words, Rules()).notes


def test_a_written_slice_spacing_that_is_not_the_distance_of_the_slices_is_told_and_not_used(tmp_path: Path) -> None:
    times, words = (-20.0, 25.0, 70.0, 180.0), ("nativ", "art", "pv", "delayed")
    assert "slice spacing" not in planned(tmp_path / "a", times, words, SpacingBetweenSlices=3.25).notes
    assert "slice spacing" not in planned(tmp_path / "b", times, words, SpacingBetweenSlices=0).notes
    found = planned(tmp_path / "c", times, words, SpacingBetweenSlices=1.5, SliceThickness=6)
    said = "3.00 mm by position, 1.50 mm written (0018,0088): the positions were used"
    assert found.notes["slice spacing"] == said
    assert found.phases[0].grid.edges[2] == pytest.approx(3.0)


def test_the_slice_spacing_of_enhanced_mr_is_compared_too(tmp_path: Path) -> None:
    def mark(ds: Dataset, group: Dataset, p: int, s: int) -> None:
        group.FrameContentSequence[0].TemporalPositionIndex = p + 1
        ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices = 4

    found = dynamic.plan(dce.study(tmp_path, [dce.Dce().enhanced(mark)]))
    assert isinstance(found, Plan) and found.notes["slice spacing"].startswith("3.00 mm by position, 4.00 mm written")
