"""`python -m engines.training`: phantom | fit | evaluate | export | package | reproduce. Parses and calls; no logic.

`phantom` needs only what the node needs; the other verbs need the `train` extra and import it when they run.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m engines.training", description=__doc__)
    verbs = top.add_subparsers(dest="verb", required=True)
    _phantom_options(verbs.add_parser("phantom", help="write one phantom study as DICOM"))
    for verb, text in (
        ("fit", "train the network of a task; writes a safetensors checkpoint"),
        ("evaluate", "measure a package on unseen seeds; prints figures with their intervals"),
        ("export", "write the ONNX graphs of a checkpoint and compare them with torch"),
        ("package", "write the model package: graphs, head, statistics, threshold, card"),
        ("reproduce", "fit, export, package and evaluate the demonstration package"),
    ):
        sub = verbs.add_parser(verb, help=text)
        sub.add_argument("task")
        sub.add_argument("--work", type=Path, default=Path("train-out"), help="folder of cohorts and checkpoints")
        sub.add_argument("--preset", default="demo", help="a preset of the task's training.yaml")
        sub.add_argument("--processes", type=int, default=1, help="processes that make phantoms")
        sub.add_argument("--threads", type=int, default=1, help="threads of torch")
        sub.add_argument("--device", default="cpu")
        sub.add_argument("--real", type=Path, action="append", default=[], help="folder of real files for the gate")
        sub.add_argument("--out", type=Path, default=None, help="package folder (default: the task's model/)")
    return top


def _phantom_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("task")
    sub.add_argument("--seed", type=int, required=True, help="anatomy, speckle, machine settings")
    sub.add_argument("--label", type=int, choices=(0, 1), required=True, help="1 = high grade planted")
    sub.add_argument("--out", type=Path, required=True, help="folder; the path of the file is printed")
    sub.add_argument("--encoding", choices=("jpeg", "raw", "rle"), default="jpeg")
    sub.add_argument("--frames", type=int, default=None, help="length of the clip")
    sub.add_argument("--generator", default="training", help="training | shifted (phantom.yaml)")
    sub.add_argument("--uid-seed", type=int, default=None, help="UIDs and dates from this number; default: fresh ones")
    sub.add_argument("--description", default=None, help="Study Description")
    sub.add_argument("--body-part", default=None, help="Body Part Examined")
    sub.add_argument("--laterality", choices=("R", "L", "B", "none"), default=None)
    sub.add_argument("--patient-name", default=None)
    sub.add_argument("--patient-id", default=None)
    sub.add_argument("--agent", default=None, help="Contrast/Bolus Agent; empty = none")


def phantom(args: argparse.Namespace) -> int:
    """Write one clip."""
    from engines.training import dicomfile

    source = importlib.import_module(f"engines.{args.task}.phantom")
    said = {
        key: getattr(args, key)
        for key in ("description", "body_part", "laterality", "patient_name", "patient_id", "agent", "uid_seed")
        if getattr(args, key) is not None
    }
    if said.get("laterality") == "none":
        said["laterality"] = ""
    clip = source.make(args.seed, args.label, source.generator(args.generator), args.frames or source.FRAMES)
    name = f"{args.task}-{args.seed}-{args.label}-{args.encoding}.dcm"
    print(dicomfile.write(clip, args.out / name, args.encoding, dicomfile.Labels(**said)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status."""
    args = parser().parse_args(argv)
    if not args.task.isidentifier() or not Path(__file__).parents[1].joinpath(args.task, "phantom.py").is_file():
        print(f"no such task: {args.task}", file=sys.stderr)
        return 2
    if args.verb == "phantom":
        return phantom(args)
    try:
        import torch  # noqa: F401
    except ImportError:
        print("training needs the extra: pip install 'dicom-node[train]'", file=sys.stderr)
        return 1
    from engines.training import verbs

    return verbs.run(args.verb, verbs.Options.from_args(args))


if __name__ == "__main__":
    raise SystemExit(main())
