"""One training step: loss, gradient, update, compiled as one program.

Decides that what is trained and what is not are two trees from the start. The frozen
one, packed weights and all, is an argument of the program that is never differentiated
and never donated; the trained one and its optimizer's state are donated and updated in
place. Losses are summed over tokens and divided by the number of tokens of the whole
batch, so that splitting a batch over micro-batches or devices changes nothing.

Costs: parameters, gradient and optimizer state of the trained tree; one micro-batch of
activations under the chosen `remat`; logits of `loss_chunk` tokens.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array

from qjax.errors import SpecError
from qjax.nn.lora import with_dropout_key
from qjax.nn.qat import at_step
from qjax.train.batch import Batch, checked
from qjax.train.fused import apply, global_norm
from qjax.train.layout import Layout, put
from qjax.train.loss import chunked_loss
from qjax.train.mesh import place_batch
from qjax.train.offload import host_states, to_host
from qjax.train.parallel import Parallel
from qjax.train.state_shardings import state_shardings


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
      trainable: The trained variables, an `nnx.State`.
      optimizer: State of the optimizer.
      step: Number of steps done, int32.
      key: PRNG key of the run; every step derives its own.
    """

    trainable: Any
    optimizer: Any
    step: Any
    key: Any


class Metrics(NamedTuple):
    """What a step measured.

    Attributes:
      loss: Mean loss over the tokens that count, nats, before the update.
      tokens: Sum of the weights: the number of tokens that count.
      grad_norm: Global norm of the gradient, before clipping.
      finite: Whether loss and gradient are; if not, the step changed nothing.
    """

    loss: Any
    tokens: Any
    grad_norm: Any
    finite: Any


class Step:
    """A compiled training step of a model.

    Args:
      model: A `Decoder`, or a module with its `hidden` and `logits`.
      tx: The optimizer.
      wrt: Filter of the variables to train; adapters by default.
      remat: What the gradient finds stored, one of `qjax.models.block.REMAT`.
      loss_chunk: Tokens whose logits exist at a time.
      offload: Keep the optimizer's state in the host's memory.
      mesh: Devices that share the step, from `qjax.train.make_mesh`; the variables of
        the model move there.

    Attributes:
      frozen: Everything of the model that is not trained.

    Raises:
      SpecError: Nothing to train, or the model cannot be split so.

    Example:
      >>> step = Step(model, optax.adamw(1e-4))
      >>> state = step.init(jax.random.key(0))
      >>> state, metrics = step(state, step.frozen, batch)
      >>> step.install(state)
    """

    def __init__(
        self,
        model: Any,
        tx: optax.GradientTransformation,
        *,
        wrt: Any = nnx.LoRAParam,
        remat: str = "block",
        loss_chunk: int = 512,
        offload: bool = False,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.model, self.offload = model, offload
        self.tx = host_states(tx) if offload else tx
        self.remat, self.loss_chunk = remat, loss_chunk
        self.graph, self.trainable, self.frozen = nnx.split(model, wrt, ...)
        if not jax.tree.leaves(self.trainable):
            raise SpecError(
                "the model has nothing to train; attach adapters with "
                "qjax.train.attach, or name other variables with wrt"
            )
        self.parallel = None if mesh is None else Parallel(Layout(mesh, model))
        where: Any = None
        if self.parallel is not None:
            place = self.parallel.layout.place
            self.trainable, self.frozen = place(self.trainable), place(self.frozen)
            nnx.update(model, self.trainable, self.frozen)
            where = self.shardings, self.parallel.layout.everywhere()
        self._run = jax.jit(self._step, donate_argnums=0, out_shardings=where)
        self._losses = jax.jit(self._sums, out_shardings=where and where[1])

    def init(self, key: Array) -> TrainState:
        """Returns the state before the first step, with copies of what is trained."""
        if self.parallel is not None:
            start = jax.jit(self._start, out_shardings=self.shardings)
            return start(self.trainable, key)
        return self._start(self.trainable, key)

    def _start(self, trainable, key):
        state = self._fresh(trainable, key)
        if not self.offload:
            return state
        return state._replace(optimizer=to_host(state.optimizer))

    def _fresh(self, trainable, key):
        trainable = jax.tree.map(jnp.copy, trainable)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(trainable, self.tx.init(trainable), zero, jnp.copy(key))

    @functools.cached_property
    def shardings(self) -> TrainState:
        """Where each array of a state lies, on a mesh."""
        assert self.parallel is not None
        layout = self.parallel.layout
        trainable, one = layout.shardings(self.trainable), layout.everywhere()
        optimizer = state_shardings(self.tx, self.trainable, trainable)
        if self.offload:
            states = jax.eval_shape(self.tx.init, self.trainable)
            states = to_host(jax.tree.map(put, states, optimizer))
            optimizer = jax.tree.map(lambda x: x.sharding, states)
        return TrainState(trainable, optimizer, one, one)

    def shapes(self, batch: Batch, where: Any = None) -> tuple[TrainState, Any, Any]:
        """What a step takes, as `jax.ShapeDtypeStruct`s with their shardings.

        Args:
          batch: Arrays or shapes.
          where: Sharding of all arrays without a mesh; the default device's if None.
        """
        key = jax.eval_shape(lambda: jax.random.key(0))
        state: Any = jax.eval_shape(self._fresh, self.trainable, key)
        arrays = jax.tree.map(lambda x: _shape(x, None), checked(batch))
        found = state, self.frozen
        if self.parallel is not None:
            layout = self.parallel.layout
            places = self.shardings, layout.shardings(self.frozen)
            return *jax.tree.map(_shape, found, places), self.placed(arrays)
        one = where or SingleDeviceSharding(jax.local_devices()[0])
        found = jax.tree.map(lambda x: _shape(x, one), (*found, arrays))
        state, frozen, arrays = found
        if self.offload:
            state = state._replace(optimizer=to_host(state.optimizer))
        return state, frozen, arrays

    def lower(self, batch: Batch, where: Any = None) -> jax.stages.Lowered:
        """Lowers the step to compile it ahead of time; see `shapes`."""
        return self._run.lower(*self.shapes(batch, where))

    def install(self, state: TrainState) -> None:
        """Puts copies of the trained variables into the model.

        Those of a run on several hosts are whole on every device afterwards.
        """
        trained = state.trainable
        if self.parallel is not None and jax.process_count() > 1:
            whole = self.parallel.layout.everywhere()
            copies = jax.jit(lambda x: x, out_shardings=whole)(trained)
        else:
            copies = jax.tree.map(jnp.copy, trained)
        nnx.update(self.model, copies)

    def __call__(
        self, state: TrainState, frozen: Any, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        """Trains on one batch; the given state is donated.

        Args:
          state: As `init` or a previous step returned it.
          frozen: `self.frozen`, or a copy of it on other devices.
          batch: Each `[accumulate, rows, time]`: `tokens` int32; `targets` int32, the
            next tokens; `weights` float32 of the targets; `positions` int32 in each
            sample, -1 for padding; `segments` int32, the sample's number in its row.

        Raises:
          SpecError: The batch lacks an array, or shapes differ.
        """
        return self._run(state, frozen, self.placed(batch))

    def placed(self, batch: Batch) -> dict[str, Array]:
        """The arrays of a batch that a step takes, on the devices of its mesh.

        Raises:
          SpecError: One is missing, shapes differ, or rows do not divide.
        """
        arrays = checked(batch)
        if self.parallel is None:
            return arrays
        return place_batch(arrays, self.parallel.layout.mesh)

    def evaluate(self, trainable: Any, frozen: Any, batch: Batch) -> tuple[Any, Any]:
        """Returns the sum of losses over a batch, and of weights, without dropout."""
        return self._losses(trainable, frozen, self.placed(batch))

    def loss(self, trainable: Any, frozen: Any, batch: Batch) -> Array:
        """Returns the sum of weighted losses of one micro-batch `[rows, time]`.

        On a mesh it is of the rows of one device, and runs there.
        """
        model = nnx.merge(self.graph, trainable, frozen)
        more: dict[str, Any] = {}
        if self.parallel is not None:
            model = self.parallel.model(model)
            more["view"] = self.parallel.block
        hidden, _ = model.hidden(
            batch["tokens"],
            positions=batch["positions"],
            segments=batch["segments"],
            remat=self.remat,
            **more,
        )
        wanted, weights = batch["targets"], batch["weights"]
        return chunked_loss(model, hidden, wanted, weights, self.loss_chunk)

    def _sums(self, trainable, frozen, batch):
        total = self._loss_sum
        if self.parallel is not None:
            total = self.parallel.losses(total)
        return total(trainable, frozen, dict(batch)), jnp.sum(batch["weights"])

    def _loss_sum(self, trainable, frozen, batch):
        def add(total, micro):
            return total + self.loss(trainable, frozen, micro), None

        return jax.lax.scan(add, jnp.zeros((), jnp.float32), batch)[0]

    def _gradients(self, trainable, frozen, batch, key):
        """Sum of the losses of a batch and its gradient."""
        count = batch["tokens"].shape[0]

        def gradient(micro, number):
            own = with_dropout_key(frozen, jax.random.fold_in(key, number))
            return jax.value_and_grad(self.loss)(trainable, own, micro)

        def add(total, items):
            return jax.tree.map(jnp.add, total, gradient(*items)), None

        if count == 1:
            return gradient(jax.tree.map(lambda x: x[0], batch), 0)
        numbers = jnp.arange(count, dtype=jnp.int32)
        zeros = jax.tree.map(jnp.zeros_like, trainable)
        start = (jnp.zeros((), jnp.float32), zeros)
        return jax.lax.scan(add, start, (batch, numbers))[0]

    def _step(self, state: TrainState, frozen: Any, batch: Batch):
        key = jax.random.fold_in(state.key, state.step)
        frozen = at_step(frozen, state.step)
        gradients = self._gradients
        if self.parallel is not None:
            gradients = self.parallel.gradient(gradients)
        loss, grads = gradients(state.trainable, frozen, dict(batch), key)
        tokens = jnp.sum(batch["weights"])
        share = 1.0 / jnp.maximum(tokens, 1.0)
        grads = jax.tree.map(lambda g: g * share.astype(g.dtype), grads)
        norm = global_norm(grads)
        loss = loss * share
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        held = (state.trainable, state.optimizer)
        trainable, optimizer = self._update(grads, held, finite)
        done = state.step + finite.astype(jnp.int32)
        state = TrainState(trainable, optimizer, done, state.key)
        return state, Metrics(loss, tokens, norm, finite)

    def _update(self, grads, held, finite):
        """Parameters and optimizer state after a step, or as they were."""
        where = None if self.parallel is None else self.shardings.trainable

        def update(held):
            trainable, optimizer = held
            return apply(self.tx, trainable, grads, optimizer, where)

        return jax.lax.cond(finite, update, lambda held: held, held)


def _shape(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
