"""Builders of headers, series and studies, so that a test shows only the attributes it is about."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dicom_node import config
from dicom_node.study import Header, Instance, Series, Study

US_MULTIFRAME = "1.2.840.10008.5.1.4.1.1.3.1"
Build = Callable[..., Any]


def _header(**attributes: Any) -> Header:
    return Header.from_json({"Modality": "US", "SOPClassUID": US_MULTIFRAME, **attributes})


def _instance(number: int, series_uid: str, attributes: Mapping[str, Any], calling: str, called: str) -> Instance:
    header = _header(
        StudyInstanceUID="1.2.3",
        SeriesInstanceUID=series_uid,
        SOPInstanceUID=f"1.2.3.{number}",
        InstanceNumber=number,
        **attributes,
    )
    path = Path(f"{number:032x}.dcm")
    return Instance(f"{number:032x}", header, "1.2.840.10008.1.2.1", "0" * 64, path, calling, called, "", "a", 0.0)


@pytest.fixture
def make_header() -> Build:
    """make_header(StudyDescription="US kidney")"""
    return _header


@pytest.fixture
def make_study() -> Build:
    """make_study({attributes of series 1}, [{of an instance of series 2}, {of another}], called="NODE")"""

    def make(*series: Mapping[str, Any] | list[Mapping[str, Any]], calling: str = "MOD", called: str = "NODE") -> Study:
        count = itertools.count(1)
        made = []
        for number, content in enumerate(series, start=1):
            of_instances = [content] if isinstance(content, Mapping) else content
            instances = [_instance(next(count), f"1.2.3.0.{number}", a, calling, called) for a in of_instances]
            made.append(Series(f"1.2.3.0.{number}", tuple(instances)))
        return Study("1.2.3", 1, tuple(made))

    return make


@pytest.fixture
def make_route() -> Build:
    """make_route(when={...}, any=[{...}]): a route as config.yaml gives it, checked by the real configuration."""

    def make(when: Any, any: Any = None, all: Any = None, **more: Any) -> config.Route:  # noqa: A002  the keys of the file
        indication = {"all": all} if all else {"any": any or [{"called_ae": "NODE"}]}
        route = {"name": "test", "engine": "test", "when": when, "indication": indication, **more}
        return config.parse({"routes": [route]}, file="config.yaml", base=Path()).routes[0]

    return make


@pytest.fixture
def judge_words() -> Build:
    """The body part of one series with these attributes."""
    from dicom_node.route import body_part

    def judge(*instances: Mapping[str, Any]) -> body_part.BodyPartVerdict:
        made = [_instance(n, "1.2.3.0.1", a, "MOD", "NODE") for n, a in enumerate(instances, start=1)]
        return body_part.judge(Series("1.2.3.0.1", tuple(made)))

    return judge
