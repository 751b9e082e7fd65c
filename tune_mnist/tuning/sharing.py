"""What one trial takes of the machines: as asked, or as tried."""

from collections import Counter
from collections.abc import Sequence

from tune_mnist.analysis.wording import count
from tune_mnist.cli import tell
from tune_mnist.errors import ClusterError
from tune_mnist.mnist.data import Split
from tune_mnist.mnist.precision import Precision, check_precision
from tune_mnist.tuning.nodes import Node, Share, in_words, living_nodes
from tune_mnist.tuning.packing import Probe, best_of, largest_node, probe_all
from tune_mnist.tuning.settings import SearchSettings

DEFAULT_GPU_SHARE = 0.25
PACK_SECONDS = 5.0  # that each packing is tried


def settle_share(settings: SearchSettings, data: Split, precision: Precision) -> Share:
    """Settle what one trial takes, and see that at least one fits.

    Raises:
        ClusterError: no node has that much.
        ConfigError: the precision asked for is a GPU's, and a trial takes none.
    """
    share = _tried_share(data) if settings.pack == "auto" else _asked_share(settings)
    if not share.gpus:
        check_precision(precision, "cpu")
    return share


def _asked_share(settings: SearchSettings) -> Share:
    nodes = living_nodes()
    gpus = settings.gpus_per_trial
    if gpus is None:
        gpus = DEFAULT_GPU_SHARE if any(node.gpus for node in nodes) else 0.0
    share = Share(cpus=settings.cpus_per_trial, gpus=gpus)
    if share.slots(nodes) == 0:
        raise ClusterError(
            f"no node can run a trial of {in_words(share.cpus, share.gpus)}: there is "
            f"{_offers(nodes)}; ask for less with --cpus-per-trial or --gpus-per-trial"
        )
    return share


def _offers(nodes: Sequence[Node]) -> str:
    alike = Counter(in_words(node.cpus, node.gpus) for node in nodes)
    return ", ".join(f"{count(number, 'node')} of {each}" for each, number in alike.most_common())


def _tried_share(data: Split) -> Share:
    """Try what serves the machine best, and say so."""

    def say(probe: Probe) -> None:
        tell(f"pack: {probe.packing}: {probe.epochs_per_hour:,.0f} epochs an hour")

    best = best_of(probe_all(largest_node(), data, PACK_SECONDS, say))
    tell(f"pack: {best.packing} it is; without trying: {best.packing.options()}")
    return best.packing.share
