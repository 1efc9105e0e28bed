"""How the state of an optimizer is split over devices, given how parameters are."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from qjax.pallas_kernels.optimizer.api import Moment8
from qjax.train.fused import MomentState
from qjax.train.moment_shards import maxima_split


def state_shardings(
    tx: optax.GradientTransformation, params: Any, shardings: Any
) -> Any:
    """Returns how a state is split, given how the parameters are.

    Moments are split like their parameters; what has another shape is whole on every
    device.

    Args:
      tx: The optimizer.
      params: The parameters, or what stands for them.
      shardings: Their tree, with a `NamedSharding` each.

    Returns:
      The tree of the state with a `NamedSharding` each.
    """
    state = jax.eval_shape(tx.init, params)
    leaves, tree = jax.tree.flatten(params)
    places = tree.flatten_up_to(shardings)
    whole = NamedSharding(places[0].mesh, PartitionSpec())
    if isinstance(state, MomentState):
        found = [
            jax.tree.map(lambda m: _split(m, p, place), moments, is_leaf=_is_moment)  # noqa: B023
            for p, place, moments in zip(
                leaves, places, tree.flatten_up_to(state.moments), strict=True
            )
        ]
        return MomentState(whole, tree.unflatten(found))

    def like(x, p, place):
        return place if x.shape == p.shape else whole

    return optax.tree.map_params(
        tx, like, state, params, shardings, transform_non_params=lambda _: whole
    )


def _is_moment(x):
    return isinstance(x, Moment8)


def _split(moment, p, place):
    if not _is_moment(moment):
        return place
    return Moment8(place, maxima_split(p.shape, place))
