"""Pre-train one encoder through a sequence of modalities: `deepspeed engine/train.py --stage pathology`."""

import sys
from typing import TYPE_CHECKING

from mnemos.engine import dist
from mnemos.engine.arguments import parse
from mnemos.sharding.command import run_command

if TYPE_CHECKING:
    from mnemos.engine.curriculum import Plan


def decide() -> "Plan":
    """Check the call, the run and the data, and return what is to be done (rank 0, no torch)."""
    verdict: list[Plan] = []

    def command(argv: object) -> None:
        arguments = parse()
        from mnemos.engine.curriculum import make_plan  # late: --help answers without numpy

        verdict.append(make_plan(arguments, dist.world_size()))
        if arguments.fresh and not arguments.dry_run:
            from mnemos.engine.run_directory import RunDirectory

            if aside := RunDirectory(verdict[0].run).move_aside():
                print(f"the old run was moved to {aside}")

    if code := run_command(command):
        raise SystemExit(code)
    return verdict[0]


def main() -> int:
    """Plan on rank 0, then do the stages on all ranks."""
    dist.adopt_environment()
    plan = dist.share(decide)
    if isinstance(plan, dist.Refusal):
        return plan.code
    from mnemos.engine.running import run_plan

    return run_plan(plan)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    dist.leave(code)
