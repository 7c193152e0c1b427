"""`python -m engines.training`: phantom, fit, evaluate, export, package, reproduce, compare, deploy, sign. It calls.

`phantom` needs only what the node needs; the other verbs need the `train` extra and import it when they run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from engines.training.recipe import Run, recipe_of, task_folder

PRECISIONS = ("fp32", "fp16")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m engines.training", description=__doc__)
    verbs = top.add_subparsers(dest="verb", required=True)
    _phantom_options(verbs.add_parser("phantom", help="write one phantom study as DICOM"))
    for verb, text in (
        ("fit", "train the networks of a task; writes safetensors checkpoints"),
        ("evaluate", "measure a package on unseen seeds; prints figures with their intervals"),
        ("export", "write the ONNX graphs of a checkpoint and compare them with torch"),
        ("package", "write the model package: graphs, head, statistics, threshold, card"),
        ("reproduce", "fit, export, package and evaluate a demonstration package; task `all` = every task"),
        ("compare", "fit and measure the arms of a task's comparisons; task `all` = every task that has some"),
    ):
        sub = verbs.add_parser(verb, help=text)
        sub.add_argument("task")
        sub.add_argument("--work", type=Path, default=Path("train-out"), help="folder of cohorts and checkpoints")
        sub.add_argument("--preset", default="demo", help="a preset of the task's training.yaml")
        sub.add_argument("--cohort", default="phantom", help="phantom, or a folder of images with labels.csv")
        sub.add_argument("--processes", type=int, default=1, help="processes that make phantoms")
        sub.add_argument("--threads", type=int, default=1, help="threads of torch")
        sub.add_argument("--device", default="cpu", help="cpu | cuda")
        sub.add_argument("--real", type=Path, action="append", default=[], help="folder of real files for the gate")
        sub.add_argument("--readers", type=Path, default=None, help="CSV of readers' scores on the test cohort")
        sub.add_argument("--out", type=Path, default=None, help="package folder (default: the task's model/)")
    sub = verbs.add_parser("deploy", help="export the graphs of a preset with weights of a fixed seed, for timing")
    _untrained_options(sub)
    sub.add_argument("--out", type=Path, required=True, help="folder; the path of every file is printed")
    sub.add_argument("--precision", choices=PRECISIONS, action="append", help="default: each")
    sub = verbs.add_parser("eager", help="the same networks in torch, timed over a pipe: started by `engines bench`")
    _untrained_options(sub)
    sub.add_argument("--threads", type=int, default=1, help="threads of torch")
    sub.add_argument("--graphs", type=Path, required=True, help="what `deploy` wrote")
    sub.add_argument("--device", default="cpu", help="cpu | cuda")
    sub.add_argument("--variant", choices=("eager", "compile", "graph"), default="eager")
    sub.add_argument("--precision", choices=PRECISIONS, default="fp32")
    sub.add_argument("--fd", type=int, required=True, help="an inherited socket")
    sub = verbs.add_parser("device", help="what torch reaches on a device, against its ceilings; prints JSON")
    sub.add_argument("task", help="a task, or `all`")
    sub.add_argument("--preset", action="append", help="default: demo; may be given again")
    sub.add_argument("--device", default="cuda", help="cpu | cuda")
    sub.add_argument("--seconds", type=float, default=2.0, help="of timing for each figure")
    sub = verbs.add_parser("labels", help="write the table of labels of a collection with a folder for each class")
    sub.add_argument("source", type=Path)
    sub.add_argument("--negative", required=True, help="name of the folder of label 0")
    sub.add_argument("--positive", required=True, help="name of the folder of label 1")
    sub.add_argument("--out", type=Path, required=True, help="new folder: copies and labels.csv")
    sub = verbs.add_parser("sign", help="sign a finished package with Ed25519; prints the public key for the site")
    sub.add_argument("package", type=Path, help="package folder")
    sub.add_argument("--key", type=Path, required=True, help="private key, PEM; the file's stem is the key_id")
    return top


def _untrained_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("task")
    sub.add_argument("--preset", default="demo", help="a preset of the task's network")


def _phantom_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("task")
    sub.add_argument("--seed", type=int, required=True, help="anatomy, speckle, machine settings")
    sub.add_argument("--label", type=int, choices=(0, 1), required=True, help="1 = the signal is planted")
    sub.add_argument("--out", type=Path, required=True, help="folder; the path of every file is printed")
    sub.add_argument("--encoding", default=None, help="jpeg | raw | rle, or what the task knows")
    sub.add_argument("--frames", type=int, default=None, help="length of a clip")
    sub.add_argument("--generator", default="training", help="training | shifted (phantom.yaml)")
    sub.add_argument("--roi", action="store_true", help="with a SEG of the lesion, where the task knows one")
    sub.add_argument("--uid-seed", type=int, default=None, help="UIDs and dates from this number; default: fresh ones")
    sub.add_argument("--description", default=None, help="Study Description")
    sub.add_argument("--body-part", default=None, help="Body Part Examined")
    sub.add_argument("--laterality", choices=("R", "L", "B", "none"), default=None)
    sub.add_argument("--patient-name", default=None)
    sub.add_argument("--patient-id", default=None)
    sub.add_argument("--agent", default=None, help="Contrast/Bolus Agent; empty = none")


def _run_of(args: argparse.Namespace) -> Run:
    out = args.out or task_folder(args.task) / "model"
    folder = None if args.cohort == "phantom" else Path(args.cohort)
    if folder is not None and args.out is None:
        raise SystemExit("--cohort DIR needs --out: a package of other data is not the shipped one")
    return Run(
        args.task, args.preset, args.work, out, args.processes, args.threads, args.device, tuple(args.real), folder,
        args.readers,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status."""
    args = parser().parse_args(argv)
    if args.verb == "labels":
        from engines.training import folder

        print(folder.from_class_folders(args.source, args.negative, args.positive, args.out), "files")
        return 0
    if args.verb == "sign":
        from engines.training import package

        print(f"{args.key.stem}.pub: {package.sign(args.package, args.key)}")
        return 0
    every = args.verb in ("reproduce", "compare", "device") and args.task == "all"
    if not every and not (args.task.isidentifier() and (task_folder(args.task) / "recipe.py").is_file()):
        print(f"no such task: {args.task}", file=sys.stderr)
        return 2
    if args.verb == "phantom":
        for path in recipe_of(args.task).write(args):
            print(path)
        return 0
    try:
        import torch  # noqa: F401
    except ImportError:
        print("training needs the extra: pip install 'dicom-node[train]'", file=sys.stderr)
        return 1
    if args.verb in ("deploy", "eager", "device"):
        return _untrained(args)
    from engines.training import verbs

    return verbs.run(args.verb, _run_of(args))


def _untrained(args: argparse.Namespace) -> int:
    if args.verb == "deploy":
        from engines.training import deploy

        for path in deploy.write(args.task, args.preset, args.out, args.precision or PRECISIONS):
            print(path)
        return 0
    if args.verb == "device":
        from engines.training import device

        tasks = (
            sorted(p.parent.name for p in task_folder("").glob("*/training.yaml"))
            if args.task == "all"
            else [args.task]
        )
        print(json.dumps(device.examine(tasks, args.preset or ["demo"], args.device, args.seconds)))
        return 0
    from engines.training import eager

    how = eager.How(args.device, args.variant, args.precision, args.threads)
    return eager.serve(args.task, args.preset, args.graphs, how, args.fd)


if __name__ == "__main__":
    raise SystemExit(main())
