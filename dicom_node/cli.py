"""The command line: parses, calls, prints; no logic. Exit codes: 0 ok; 1 the thing asked about is not well; 2 usage;
4 unknown study, destination or engine; 75 root in use; 78 configuration."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dicom_node import __version__
from dicom_node.errors import ConfigError, NodeError, RootInUseError, UnknownTargetError

EX_TEMPFAIL, EX_CONFIG = 75, 78


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config", type=Path, default=Path("config.yaml"), metavar="PATH", help="default: ./config.yaml"
    )
    printing = argparse.ArgumentParser(add_help=False)
    printing.add_argument("--json", action="store_true", help="print JSON (docs/schemas)")

    parser = argparse.ArgumentParser(prog="dicom-node", description="Inference node for a PACS.")
    parser.add_argument("--version", action="version", version=f"dicom-node {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", parents=[common], help="run the node")
    run.add_argument("--only", choices=["listen", "work"], help="one half, so that systemd can supervise the two apart")
    run.add_argument("--link-fd", type=int, help=argparse.SUPPRESS)

    demo = commands.add_parser("demo", help="run the whole line once on this machine and show what comes out")
    demo.add_argument("--keep", type=Path, metavar="DIR", help="keep everything that was sent and received here")

    infer = commands.add_parser("infer", parents=[common, printing], help="the same line over files, without a network")
    infer.add_argument("folder", type=Path)
    infer.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the SRs and captures go")

    commands.add_parser("check", parents=[common, printing], help="is this configuration usable on this machine?")
    commands.add_parser(
        "status", parents=[common, printing], help="what waits, what is stuck, which destination is paused"
    )

    explain = commands.add_parser("explain", parents=[common, printing], help="what happened to a study and why")
    explain.add_argument("study", nargs="?", metavar="STUDY_UID")
    explain.add_argument("--file", nargs="+", type=Path, metavar="PATH", help="how the routes would judge these files")
    explain.add_argument("--called-ae", default="", metavar="AE", help="with --file: as if sent to this AE title")
    explain.add_argument("--calling-ae", default="", metavar="AE", help="with --file: as if sent by this AE title")

    replay = commands.add_parser(
        "replay", parents=[common, printing], help="judge stored studies by changed rules; prints differences only"
    )
    replay.add_argument("--since", default="7d", metavar="TIME", help="how far back: 30m, 12h, 7d, 2w; default: 7d")
    replay.add_argument(
        "--with",
        dest="new",
        type=Path,
        metavar="NEW.yaml",
        help="the new rules; default: --config against what was decided",
    )

    retry = commands.add_parser(
        "retry", parents=[common], help="give DEAD jobs and deliveries of a study a second chance"
    )
    retry.add_argument("study", metavar="STUDY_UID")
    complete = commands.add_parser("complete", parents=[common], help="declare a study complete as it is, now")
    complete.add_argument("study", metavar="STUDY_UID")
    complete.add_argument(
        "--accept-conflict", action="store_true", help="the instances are of one patient, whatever they say"
    )

    echo = commands.add_parser("echo", parents=[common, printing], help="C-ECHO a destination")
    echo.add_argument("destination", metavar="DEST")

    engines = commands.add_parser("engines", help="tasks and model packages")
    actions = engines.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", parents=[common, printing], help="what is installed, and whether it is accepted here")
    install = actions.add_parser(
        "install", parents=[common, printing], help="check a package and copy it below the store root; not yet active"
    )
    install.add_argument("folder", type=Path, metavar="DIR", help="the package: the folder that holds manifest.yaml")
    activate = actions.add_parser("activate", parents=[common], help="put an installed package to use, now")
    activate.add_argument("task", metavar="TASK")
    activate.add_argument("version", metavar="VERSION")
    rollback = actions.add_parser("rollback", parents=[common], help="go back to the package before, now")
    rollback.add_argument("task", metavar="TASK")
    verify = actions.add_parser(
        "verify", parents=[common, printing], help="hash every package again and replay its golden cases"
    )
    verify.add_argument("task", nargs="?", metavar="TASK")
    build = actions.add_parser(
        "build", parents=[common, printing], help="compile the plans that this machine's backends need, ahead of time"
    )
    build.add_argument("task", nargs="?", metavar="TASK")
    build.add_argument("--sm", type=int, metavar="N", help="for a GPU that is not here, by compute capability (86)")
    bench = actions.add_parser("bench", parents=[common, printing], help="time every engine on every backend")
    _bench_options(bench)
    return parser


def _bench_options(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("task", nargs="?", metavar="TASK")
    bench.add_argument(
        "--preset", action="append", choices=["demo", "paper", "nano"], help="default: demo; may be given again"
    )
    bench.add_argument(
        "--backend", action="append", default=[], metavar="NAME", help="only this one; may be given again"
    )
    bench.add_argument("--seconds", type=float, default=3.0, metavar="N", help="of timing for each row; default: 3")
    bench.add_argument("--rounds", type=int, default=7, metavar="N", help="interleaved rounds; default: 7")
    bench.add_argument("--threads", type=int, default=0, metavar="N", help="of each backend; default: as a worker has")
    bench.add_argument("--graphs", type=Path, metavar="DIR", help="keep exported graphs here, and use them again")
    bench.add_argument("--gate", action="store_true", help="exit 1 unless every target on ratios holds")


def main(argv: list[str] | None = None) -> int:
    """Entry point of `dicom-node`."""
    args = _parser().parse_args(argv)
    try:
        return int(_dispatch(args))
    except ConfigError as e:
        return _complain(e, EX_CONFIG)
    except RootInUseError as e:
        return _complain(e, EX_TEMPFAIL)
    except UnknownTargetError as e:
        return _complain(e, 4)
    except NodeError as e:
        return _complain(e, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away; nothing is wrong
        return 0


def _complain(error: Exception, code: int) -> int:
    print(f"dicom-node: {error}", file=sys.stderr)
    return code


def _dispatch(args: argparse.Namespace) -> int:
    # Imported per command: `dicom-node status` need not load what `run` needs.
    if args.command == "demo":
        from dicom_node.demo import demo

        return demo(args.keep)
    from dicom_node import config as configuration

    if args.command == "explain" and bool(args.study) == bool(args.file):
        print("dicom-node explain: either STUDY_UID or --file PATH…", file=sys.stderr)
        return 2
    if args.command == "replay" and (wrong := _wrong_since(args.since)):
        print(f"dicom-node replay: --since: {wrong}", file=sys.stderr)
        return 2
    if args.command == "run" and args.only == "listen":
        from dicom_node.service.listening import run_listener, without_decoders

        without_decoders()  # before the configuration: its keywords are pydicom's
        return run_listener(configuration.load(args.config), args.link_fd)
    config = configuration.load(args.config)
    if args.command == "run":
        from dicom_node.service import start

        return start.run(config, args.config, only=args.only)
    return _operate(args, config)


def _wrong_since(text: str) -> str:
    from dicom_node.service.replay import seconds_of

    try:
        seconds_of(text)
    except ValueError as e:
        return str(e)
    return ""


def _operate(args: argparse.Namespace, config: Any) -> int:
    from dicom_node.service import operate

    if args.command == "infer":
        answer, code = operate.infer_folder(config, args.folder, args.out)
        return _show(args, answer, operate.infer_text, code)
    if args.command == "check":
        answer, code = operate.check(config)
        return _show(args, answer, operate.check_text, code)
    if args.command == "status":
        return _show(args, operate.status(config), operate.status_text)
    if args.command == "explain" and args.file:
        answer, code = operate.explain_files(config, args.config, args.file, args.calling_ae, args.called_ae)
        return _show(args, answer, operate.explain_files_text, code)
    if args.command == "replay":
        from dicom_node.service import replay

        return _show(args, replay.replay(config, args.config, args.since, args.new), replay.replay_text)
    if args.command == "explain":
        return _show(args, operate.explain(config, args.study), operate.explain_text)
    if args.command in ("retry", "complete"):
        accept = bool(getattr(args, "accept_conflict", False))
        print(operate.command(config, args.command, args.study, accept_conflict=accept))
        return 0
    if args.command == "echo":
        answer, code = operate.echo(config, args.destination)
        return _show(args, answer, operate.echo_text, code)
    return _engines(args, config)


def _engines(args: argparse.Namespace, config: Any) -> int:
    from dicom_node.service import operate

    if args.action == "install":
        return _show(args, operate.engines_install(config, args.folder), operate.install_text)
    if args.action == "verify":
        verified, code = operate.engines_verify(config, args.task)
        return _show(args, verified, operate.verify_text, code)
    if args.action == "build":
        from dicom_node.service import building

        built, code = building.build(config, args.task, args.sm)
        return _show(args, built, building.text, code)
    if args.action == "bench":
        return _bench(args, config)
    if args.action in ("activate", "rollback"):
        print(operate.switch(config, args.action, args.task, getattr(args, "version", "")))
        return 0
    return _show(args, operate.engines_list(config), operate.engines_text)


def _bench(args: argparse.Namespace, config: Any) -> int:
    from dicom_node.service import bench, bench_table

    if args.seconds <= 0 or args.rounds < 1 or args.threads < 0:
        print("dicom-node engines bench: --seconds above 0, --rounds of 1 and more", file=sys.stderr)
        return 2
    asked = bench.Asked(
        args.task, tuple(dict.fromkeys(args.preset or ["demo"])), tuple(args.backend), args.seconds, args.rounds,
        args.threads, args.graphs,
    )  # fmt: skip
    answer, held = bench.bench(config, asked, lambda line: print(line, file=sys.stderr, flush=True))
    return _show(args, answer, bench_table.text, 0 if held or not args.gate else 1)


def _show(args: argparse.Namespace, answer: Any, text: Any, code: int = 0) -> int:
    print(json.dumps(answer, indent=2, ensure_ascii=False) if args.json else text(answer))
    return code
