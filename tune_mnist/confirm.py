"""Confirm a search's winners on fresh seeds.

python -m tune_mnist.confirm results/default                3 winners, 5 seeds, all images
python -m tune_mnist.confirm results/default --top 1 --seeds 2 --epochs 3 --images 6000
"""

from tune_mnist.cli import run
from tune_mnist.tuning.settings import ConfirmSettings


def confirm(settings: ConfirmSettings) -> int:
    # Imported here: Ray takes two seconds, which --help and a mistyped option need not wait for.
    from tune_mnist.tuning import launch

    return launch.confirm(settings)


if __name__ == "__main__":
    run("confirm", ConfirmSettings, confirm)
