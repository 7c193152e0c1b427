"""The evidence table as data: codes, defined terms and words that name a body part. Nothing here decides anything.

Words are written as `text.normalise` leaves them (lower case, no accents); `*` stands for any further letters. To add
a language, add its words: tests check the form, and docs/routing.md is generated from here (`python -m
dicom_node.route.tables`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

from dicom_node.config import BodyPart

Codes: TypeAlias = Mapping[tuple[str, str], frozenset[str]]
"""(Code Value, Coding Scheme Designator) -> the body parts it stands for."""

BODY_PARTS: Final[tuple[BodyPart, ...]] = ("THYROID", "KIDNEY", "LIVER", "SCROTUM")
ELSEWHERE: Final = "ELSEWHERE"
"""Stands for every organ no engine is made for: it competes with the four, so contradicting evidence is seen."""


def _one(part: str, *values: str, scheme: str = "SCT") -> dict[tuple[str, str], frozenset[str]]:
    return {(value, scheme): frozenset({part}) for value in values}


# PS3.16 CID 4 "Anatomic Region" and CID 4030, SNOMED CT. Compared by value and scheme, never by meaning.
ANATOMY: Final[Codes] = MappingProxyType(
    _one("THYROID", "69748006", "119281005", "29565003", "79163004", "40867004", "362892003")
    | _one("KIDNEY", "64033007", "25990002")  # 64033007 is "Endo-renal" in CID 4: the same code
    | _one("LIVER", "10200004", "303270005", "71133005")
    | _one("SCROTUM", "40689003", "20233005", "87644002", "27175001", "31688004")
    | _one(ELSEWHERE, "69536005", "774007", "12738006", "76752008", "80891009", "51185008", "816094009")
    | _one(ELSEWHERE, "41216001", "35039007", "15497006", "23451007", "111002")
)
# Regions are compatible with several body parts and decide nothing by themselves.
REGIONS: Final[Codes] = MappingProxyType(
    dict.fromkeys(
        [("818981001", "SCT"), ("113345001", "SCT"), ("818982008", "SCT")],
        frozenset({"KIDNEY", "LIVER"}),
    )
    | _one("THYROID", "45048000")
    | _one("SCROTUM", "816092008", "12921003")
)
# The SNOMED-RT style values of old devices ("T-71000"); accepted on input, never written (PS3.16 8.1).
SRT_TO_SCT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "T-B6000": "69748006",
        "T-71000": "64033007",
        "T-62000": "10200004",
        "T-50007": "303270005",
        "T-94000": "40689003",
        "T-98000": "20233005",
        "T-95000": "87644002",
        "T-D4000": "113345001",
        "T-D1600": "45048000",
        "T-D6000": "12921003",
        "T-D1100": "69536005",
        "T-D1000": "774007",
        "T-A0100": "12738006",
        "T-04000": "76752008",
        "T-32000": "80891009",
        "T-D3000": "51185008",
        "T-92000": "41216001",
        "T-83000": "35039007",
        "T-87000": "15497006",
        "T-B3000": "23451007",
        "T-B7000": "111002",
    }
)
SRT_SCHEMES: Final = frozenset({"SRT", "SNM3", "99SDM"})
# Procedure codes that mean the same everywhere: LOINC of CID 12320. A site's own codes come on top.
PROCEDURES: Final[Codes] = MappingProxyType(
    _one("THYROID", "25010-0", scheme="LN")
    | _one("KIDNEY", "38036-0", scheme="LN")
    | _one("LIVER", "28614-6", scheme="LN")
    | _one("SCROTUM", "25002-7", scheme="LN")
)

# Image Type value 3 of ultrasound (PS3.3 C.8.5.6.1.1), and what vendors write instead.
IMAGE_TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {"THYROID": "THYROID", "SCROTAL": "SCROTUM", "RENAL": "KIDNEY", "KIDNEY": "KIDNEY", "LIVER": "LIVER"}
    | {"TESTIS": "SCROTUM", "TESTICLE": "SCROTUM", "SCROTUM": "SCROTUM"}
    | dict.fromkeys(("BREAST", "CARDIOLOGY", "CHEST", "TTE", "TEE", "FETAL HEART", "NEONATAL HEAD"), ELSEWHERE)
    | dict.fromkeys(("OBSTETRICAL", "GYNECOLOGY", "ENDOVAGINAL", "ENDORECTAL", "OPHTHALMIC"), ELSEWHERE)
    | dict.fromkeys(("TRANSCRANIAL", "MUSCULOSKELETAL", "EPICARDIAL", "INTRACARDIAC"), ELSEWHERE)
)
IMAGE_TYPE_REGIONS: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    dict.fromkeys(("ABDOMINAL", "ABDOMEN", "ABDOM/RAD"), frozenset({"KIDNEY", "LIVER"}))
    | {"RETROPERITONEAL": frozenset({"KIDNEY"}), "PELVIC": frozenset({"SCROTUM"})}
    | {"SMALL PARTS": frozenset({"THYROID", "SCROTUM"})}
)

# Body Part Examined (0018,0015), normalised and without left/right: DICOM terms, then what vendors write.
BODY_PART_TERMS: Final[Mapping[str, str]] = MappingProxyType(
    dict.fromkeys(("thyroid", "thyr", "thyroidgland", "thyroid gland"), "THYROID")
    | dict.fromkeys(("kidney", "kidneys", "kid", "renal", "ren"), "KIDNEY")
    | dict.fromkeys(("liver", "liv", "hepatic"), "LIVER")
    | dict.fromkeys(("testis", "testes", "testicle", "testicles", "scrotum", "scrot", "epididymis"), "SCROTUM")
    | dict.fromkeys(("head", "brain", "skull", "breast", "heart", "chest", "lung", "knee", "hip"), ELSEWHERE)
    | dict.fromkeys(("foot", "hand", "ankle", "wrist", "elbow", "shoulder", "arm", "leg", "extremity"), ELSEWHERE)
    | dict.fromkeys(("cspine", "lspine", "tspine", "spine", "prostate", "uterus", "ovary", "bladder"), ELSEWHERE)
    | dict.fromkeys(("eye", "orbit", "ear", "pancreas", "spleen", "gallbladder", "aorta", "carotid"), ELSEWHERE)
)
BODY_PART_REGIONS: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    dict.fromkeys(("abdomen", "abd", "abdo", "abdomenpelvis", "abdomen pelvis"), frozenset({"KIDNEY", "LIVER"}))
    | {"retroperitoneum": frozenset({"KIDNEY"}), "neck": frozenset({"THYROID"}), "pelvis": frozenset({"SCROTUM"})}
)
SIDES: Final = frozenset({"l", "r", "lt", "rt", "lft", "rgt", "left", "right", "links", "rechts", "bilat", "both", "b"})

# Words of descriptions. Where a word is also something else ("rein", "rim", "rene"), only phrases stand here.
WORDS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "THYROID": (
            *("thyroid*", "thyr", "schilddrus*", "schilddrues*", "struma", "strumen", "goiter", "goitre"),
            *("tiroid*", "tireoid*", "schildklier*", "skoldkort*", "skjoldbrusk*", "kilpirau*", "tarczyc*"),
            *("stitn*", "щитовид*", "щитоподіб*", "θυρεοειδ*", "甲状腺", "甲狀腺", "갑상선", "갑상샘"),
        ),
        "KIDNEY": (
            *("kidney*", "renal*", "renaux", "kub", "niere*", "nier", "reins", "du rein", "le rein", "rein gauche"),
            *("rein droit", "rinon*", "reni", "rene destro", "rene sinistro", "rene dx", "rene sn", "rene sx"),
            *("del rene", "al rene", "rins", "do rim", "rim direito", "rim esquerdo", "njur*", "nyre*", "munuais*"),
            *("nerk*", "nerek", "ledvin*", "bobrek*", "bobreg*", "почк*", "почек", "почеч*", "нирк*", "нирок"),
            *("νεφρ*", "肾", "腎", "신장", "콩팥"),
        ),
        "LIVER": (
            *("liver", "livers", "hepar", "hepat*", "leber*", "foie", "higado*", "fegato", "epatic*", "epato*"),
            *("figado*", "lever", "levern", "leveren", "maksa*", "watrob*", "jater*", "jatra", "jatr*", "karaciger*"),
            *("печен*", "печінк*", "ηπαρ", "ηπατ*", "肝", "간", "간장", "간암", "간세포", "간초음파", "간종"),
        ),
        "SCROTUM": (
            *("testis", "testes", "testicle", "testicles", "testicular", "scrot*", "epididym*", "hoden*", "skrot*"),
            *("nebenhoden*", "testicul*", "bourses", "escrot*", "bolsa escrotal", "testicol*", "zaadbal*", "teelbal*"),
            *("testik*", "pungen", "kives*", "jader", "jadra", "moszn*", "varle", "varlat*", "sourk*"),
            *("мошон*", "яичк*", "яичек", "яєчк*", "калитк*", "οσχε*", "ορχεων"),
            *("睾丸", "睪丸", "阴囊", "陰囊", "陰嚢", "附睾", "精巣", "고환", "음낭"),
        ),
    }
)
# Other organs: first those whose names hold one of ours, which are blanked before WORDS are looked for.
WORDS_ELSEWHERE: Final[tuple[str, ...]] = (
    *("parathyr*", "paratiroid*", "paratireoid*", "nebenschilddrus*", "nebenschilddrues*", "bijschildklier*"),
    *("bischildkort*", "biskjoldbrusk*", "przytarczyc*", "pristitn*", "паращитовид*", "околощитовид*"),
    *("甲状旁腺", "甲狀旁腺", "副甲状腺", "副甲狀腺", "부갑상선", "부갑상샘"),
    *("adrenal*", "suprarenal*", "nebenniere*", "surrenal*", "suprarrenal*", "bijnier*", "binjur*", "binyre*"),
    *("nadnercz*", "nadledvin*", "надпочечн*", "наднирк*", "επινεφρ*", "肾上腺", "腎上腺", "副腎", "부신"),
    *("head", "brain", "skull", "cerebr*", "kopf*", "schadel*", "gehirn*", "hirn*", "crane", "encephal*"),
    *("cerveau", "craneo", "encefal*", "cranio", "hoofd", "hersen*", "glow*", "mozg*", "голов*", "череп*"),
    *("头颅", "颅脑", "脑", "頭部", "脳", "뇌"),
    *("breast*", "mamm*", "brust*", "seins", "du sein", "mamas", "piersi", "молочн*", "乳腺", "乳房", "유방"),
    *("heart", "cardi*", "echocardi*", "echokardi*", "herz*", "coeur", "corazon", "cuore", "serc*", "сердц*"),
    *("心脏", "心臟", "心臓", "심장"),
    *("knee*", "shoulder*", "elbow*", "wrist*", "ankle*", "spine", "lumbar*", "knie*", "schulter*", "ellenbogen*"),
    *("wirbelsaule*", "hws", "bws", "lws", "genou*", "epaule*", "rachis", "rodilla*", "hombro*", "codo"),
    *("columna", "ginocchio", "spalla", "膝", "肩", "脊柱", "腰椎"),
    *("prostat*", "uterus", "uterin*", "ovary", "ovarian", "ovaries", "gebarmutter*", "前列腺", "子宫", "卵巢"),
    *("carotid*", "karotis*", "颈动脉"),
)
# Phrases that hold one of our words and name no organ to be examined; blanked, no evidence.
WORDS_BLANKED: Final[tuple[str, ...]] = (
    *("renal function", "renal failure", "renal insufficiency", "renal impairment", "renal dose"),
    *("nierenfunktion*", "niereninsuffizienz*", "nierenversagen*", "fonction renale", "insuffisance renale"),
    *("insuficiencia renal", "funcion renal", "insufficienza renale", "funzione renale"),
    *("肾功能", "腎功能", "腎機能", "肝素", "肝功能", "thyroid shield", "thyroid collar", "thyroidectom*"),
    *("thyreoidektom*", "pre transplant*", "post biops*", "prior biops*", "previous biops*", "after biops*"),
    *("nach biopsie", "nach punktion", "before biops*", "without biops*", "transplant candidate"),
)
# The examination is of another kind than the studies the engines follow: whatever the body part, it is not taken.
WORDS_EXCLUDED: Final[tuple[str, ...]] = (
    *("*biops*", "fna", "fnab", "fnac", "fine needle", "feinnadel*", "guided", "guidance", "gesteuert*"),
    *("*punktion*", "*transplant*", "*trasplant*", "*trapiant*", "allograft", "ntx", "ltx", "greffe*"),
    *("greffon*", "*przeszczep*"),
    *("ablation*", "rfa", "tace", "embolisat*", "embolizat*", "drainage*", "nephrostom*", "echoguid*"),
    *("guidee", "guiada", "guiado"),
    *("биопс*", "*трансплант*", "пункц*", "*биопси*"),
    *("穿刺", "活检", "活檢", "移植", "引导", "引導", "消融", "生検", "이식", "생검", "조직검사"),
)

# Contrast: agents of CID 12030 and CID 12 by name, and the words for "with contrast".
CONTRAST_WORDS: Final[tuple[str, ...]] = (
    *("ceus", "contrast", "contrasts", "contrasted", "kontrast*", "contraste*", "contrasto", "mdc", "kontrastow*"),
    *("mit km", "km gabe", "post km", "nach km", "km sono*", "ce us", "ce mri", "ce mrt", "dce", "arterial phase"),
    *("portal venous phase", "arterielle phase", "portalvenos*", "动脉期", "門脈相"),
    *("门脉期", "контраст*", "σκιαγραφ*"),
    *("造影", "增强", "增強", "조영", "post gd", "gd dtpa", "gadolin*"),
    *("sonovue", "lumason", "sonazoid", "definity", "luminity", "optison", "levovist", "microbubble*"),
    *("omniscan", "gadovist", "gadavist", "dotarem", "clariscan", "magnevist", "multihance", "prohance"),
    *("primovist", "eovist", "gadoxet*", "elucirem", "vueway"),
)
NO_CONTRAST_WORDS: Final[tuple[str, ...]] = (
    *("without contrast", "w o contrast", "wo contrast", "no contrast", "non contrast", "noncontrast", "unenhanced"),
    *("pre contrast", "precontrast", "ohne kontrast*", "ohne km", "nativ", "sans contraste"),
    *("sans injection", "sin contraste", "senza contrasto", "senza mdc", "sem contraste", "zonder contrast"),
    *("utan kontrast", "uden kontrast", "uten kontrast", "bez kontrast*", "без контраст*", "平扫", "平掃"),
    *("非造影", "単純mri", "単純ct", "비조영"),
)
# "With and without" is with; phase contrast is no agent.
CONTRAST_BOTH: Final[tuple[str, ...]] = (
    *("with and without contrast", "without and with contrast", "w wo contrast", "w and wo contrast"),
    *("w and w o contrast", "wo w contrast", "mit und ohne kontrast*", "ohne und mit kontrast*", "mit und ohne km"),
    *("nativ und km", "nativ und kontrast*", "nativ und mit kontrast*", "con y sin contraste", "sin y con contraste"),
    *("avec et sans contraste", "sans et avec contraste", "con e senza contrasto", "senza e con contrasto"),
    *("com e sem contraste", "平扫 增强", "平扫增强", "平扫及增强", "平扫加增强"),
)
CONTRAST_BLANKED: Final[tuple[str, ...]] = (
    "phase contrast",
    "phasenkontrast*",
    "contrast resolution",
    "tissue contrast",
)
NO_AGENT: Final = frozenset(
    {"", "no", "none", "n", "nil", "na", "n a", "unknown", "without", "ohne", "keine", "无", "0"}
)
