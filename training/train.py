"""Trains a detector by a recipe: accelerate launch training/train.py RECIPE.yaml [--name value …]"""

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

try:
    from vit_adapter.training.recipe import SETTINGS, Recipe, load_recipe
    from vit_adapter.training.training_run import Losses, StopRequested, TrainingRun
except ModuleNotFoundError as error:
    if error.name != "vit_adapter":
        raise
    sys.exit("vit_adapter is not installed: run `pip install -e .` in the repository's folder")

import torch.distributed

USAGE = "usage: accelerate launch training/train.py RECIPE.yaml [--name value …]"
INPUT_AT_FAULT = 2


def train(recipe: Recipe) -> dict[str, Any]:
    """Runs a recipe to its end, from its newest checkpoint if there is one, and returns what metrics.json holds.

    Raises:
        ValueError: the recipe's input is at fault, or the loss is not finite.
        StopRequested: SIGTERM came; the run can be continued.
    """
    run = TrainingRun(recipe)
    checkpoint_every = recipe.checkpoint_every_steps or run.steps_per_epoch
    evaluate_every = (recipe.evaluate_every_epochs or recipe.num_epochs) * run.steps_per_epoch
    recent: list[Losses] = []
    with run.progress("training", run.last_step, done=run.first_step) as bar:
        for step in range(run.first_step, run.last_step):
            losses, stop = run.take_step(step)
            done = step + 1
            recent.append(losses)
            bar.set_postfix(loss=f"{mean(recent)['loss']:.3f}", refresh=False)
            bar.update()
            if done % recipe.log_every_steps == 0 or done == run.last_step:
                run.log(done, mean(recent))
                recent.clear()
            if done % checkpoint_every == 0 or done == run.last_step or stop:
                run.save_checkpoint(done)
            if stop:
                raise StopRequested(
                    f"stopped after step {done} of {run.last_step}: the same command goes on from there"
                )
            if done % evaluate_every == 0 and done < run.last_step:
                run.evaluate(done)
    return run.finish()


def mean(losses: Sequence[Losses]) -> Losses:
    """The mean of each loss."""
    return {name: sum(entry[name] for entry in losses) / len(losses) for name in losses[0]}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n{SETTINGS}")
        return 0 if arguments else INPUT_AT_FAULT
    try:
        train(load_recipe(arguments[0], arguments[1:]))
    except ValueError as error:
        # A data worker's error arrives with its traceback, and ends with the sentence.
        from_worker = "Original Traceback" in str(error)
        sentence = str(error).strip().splitlines()[-1].removeprefix("ValueError: ") if from_worker else error
        print(f"error: {sentence}", file=sys.stderr)
        return INPUT_AT_FAULT
    except StopRequested as stop:
        print(stop, file=sys.stderr)
        return 0
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def leave(exit_code: int) -> NoReturn:
    """Ends the process. One of several does without Python's teardown: gloo's threads abort it now and then, and a run
    that is complete would count as failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(exit_code)
    sys.exit(exit_code)


if __name__ == "__main__":
    leave(main())
