"""What one trial takes of the machines: as asked, or as tried."""

from tune_mnist.cli import tell
from tune_mnist.errors import ClusterError
from tune_mnist.mnist.data import Split
from tune_mnist.tuning.cluster import Share, node_resources
from tune_mnist.tuning.packing import Probe, best_of, largest_node, probe_all
from tune_mnist.tuning.settings import SearchSettings

DEFAULT_GPU_SHARE = 0.25
PACK_SECONDS = 5.0  # that each packing is tried


def settle_share(settings: SearchSettings, data: Split) -> Share:
    """Settle what one trial takes, and see that at least one fits.

    Raises:
        ClusterError: no node has that much.
    """
    if settings.pack == "auto":
        return _tried_share(data)
    nodes = node_resources()
    gpus = settings.gpus_per_trial
    if gpus is None:
        gpus = DEFAULT_GPU_SHARE if any(node.get("GPU") for node in nodes) else 0.0
    share = Share(cpus=settings.cpus_per_trial, gpus=gpus)
    if share.slots() == 0:
        offers = "; ".join(
            f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes
        )
        raise ClusterError(
            f"no machine can run a trial of {share.cpus:g} CPUs and {share.gpus:g} GPUs: there "
            f"is {offers}; ask for less with --cpus-per-trial or --gpus-per-trial"
        )
    return share


def _tried_share(data: Split) -> Share:
    """Try what serves the machine best, and say so."""

    def say(probe: Probe) -> None:
        tell(f"pack: {probe.packing}: {probe.epochs_per_hour:,.0f} epochs an hour")

    best = best_of(probe_all(largest_node(), data, PACK_SECONDS, say))
    tell(f"pack: {best.packing} it is; without trying: {best.packing.options()}")
    return best.packing.share
