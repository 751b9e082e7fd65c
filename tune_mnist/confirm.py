"""Confirm a search's winners on fresh seeds.

python -m tune_mnist.confirm results/default                3 winners, 5 seeds, all images
python -m tune_mnist.confirm results/default --top 1 --seeds 2 --epochs 3 --images 6000
"""

from tune_mnist import supervise

if __name__ == "__main__":  # before the imports: the parent needs none of them
    supervise.watch("the same command")

from tune_mnist.cli import outlive_output, run
from tune_mnist.tuning.settings import ConfirmSettings


def confirm(settings: ConfirmSettings) -> int:
    # Imported here: Ray takes two seconds, which --help and a mistyped option need not wait for.
    from tune_mnist.tuning import launch

    outlive_output()
    return launch.confirm(settings)


if __name__ == "__main__":
    run("confirm", ConfirmSettings, confirm)
