"""What training changes: the networks, their optimizers and averages, and the record of how it went."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import ranks
from .runtime import CourseError


class NotFiniteError(CourseError):
    """A loss or a gradient was infinite or not a number; the update was skipped."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. ``steps`` and ``batch_size`` count over all ranks; an epoch drops its incomplete last batch.

    ``clip_norm`` bounds the norm of each update's gradient; ``ema`` maps a network's name to the decay of its
    exponential moving average. A checkpoint is written every ``checkpoint_every`` steps and at the end.
    """

    steps: int
    batch_size: int
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    clip_norm: float | None = None
    ema: Mapping[str, float] = field(default_factory=dict)
    checkpoint_every: int = 500
    log_every: int = 50
    keep: int = 2

    def __post_init__(self):
        object.__setattr__(self, "ema", {name: float(decay) for name, decay in self.ema.items()})
        object.__setattr__(self, "device", str(self.device))
        at_least = {"steps": 0, "seed": 0, "batch_size": 1, "checkpoint_every": 1, "log_every": 1, "keep": 1}
        for name, least in at_least.items():
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < least:
                raise CourseError(f"TrainConfig.{name} is {value!r}: it must be a whole number of at least {least}")
            object.__setattr__(self, name, int(value))
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise CourseError(f"TrainConfig.clip_norm is {self.clip_norm}: it must be a positive number, or None")
        for name, decay in self.ema.items():
            if not 0 <= decay < 1:
                raise CourseError(f"TrainConfig.ema[{name!r}] is {decay}: a decay lies in [0, 1)")


class TrainState:
    """The one mutable object of a run: ``nets`` and ``optimizers`` by name, ``ema``, ``step_count`` and ``history``.

    ``optimizers["vae"]`` decides which parameters ``minimize("vae", loss)`` moves; it need not be those of one network.
    ``history`` maps the name of each figure that the step returned to its values, one per step. Whether a network is
    in training or evaluation mode is the caller's choice. A learning-rate schedule is a function of ``step_count`` that
    the step writes into ``optimizers[name].param_groups``.
    """

    def __init__(self, nets: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]):
        self.nets = dict(nets)
        self.optimizers = dict(optimizers)
        for name, optimizer in self.optimizers.items():
            if isinstance(optimizer, torch.optim.LBFGS):
                raise CourseError(
                    f"optimizers[{name!r}] is LBFGS, which evaluates a loss many times: use another, or call it"
                )
        self.ema: dict[str, AveragedModel] = {}
        self.step_count = 0
        self.history: dict[str, list[float]] = {}
        self.clip_norm: float | None = None
        self.device = next((p.device for net in self.nets.values() for p in net.parameters()), torch.device("cpu"))

    def prepare(self, device: torch.device, clip_norm: float | None, ema: Mapping[str, float]) -> None:
        """Move the networks to ``device`` and start the averages that do not exist yet."""
        if unknown := sorted(set(ema) - set(self.nets)):
            raise CourseError(f"TrainConfig.ema names {unknown[0]!r}, but the networks are {sorted(self.nets)}")
        owned = {id(parameter) for net in self.nets.values() for parameter in net.parameters()}
        for name, optimizer in self.optimizers.items():
            if any(id(parameter) not in owned for group in optimizer.param_groups for parameter in group["params"]):
                raise CourseError(
                    f"optimizers[{name!r}] holds a parameter of no network in nets: it would not be saved"
                )
        self.device, self.clip_norm = device, clip_norm
        for net in self.nets.values():
            net.to(device)
        self.ema = {name: self.ema.get(name) or AveragedModel(self.nets[name]) for name in ema}
        for name, average in self.ema.items():
            average.to(device).multi_avg_fn = get_ema_multi_avg_fn(ema[name])

    def minimize(self, name: str, loss: Tensor) -> None:
        """One update of ``optimizers[name]`` on the scalar ``loss``; no other parameter gets a gradient.

        Gradients are averaged over ranks and clipped to ``clip_norm``. Raises ``NotFiniteError``, and moves nothing,
        if the loss or the gradient is not finite.
        """
        if name not in self.optimizers:
            raise CourseError(f"minimize({name!r}, …): the optimizers are {sorted(self.optimizers)}")
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise CourseError(f"the loss {name!r} is {type(loss).__name__} without a gradient: is something detached?")
        if loss.numel() != 1:
            raise CourseError(f"the loss {name!r} has shape {tuple(loss.shape)}: a loss is one number, take its mean")
        optimizer = self.optimizers[name]
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if not parameters:
            raise CourseError(f"optimizers[{name!r}] has only frozen parameters: nothing can be minimized")
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward(inputs=parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            raise CourseError(f"the loss {name!r} reaches no parameter of optimizers[{name!r}]: is something detached?")
        # One averaging here, where the gradient is complete, is all that several processes need. Wrappers such as
        # DistributedDataParallel do it inside backward, which hides it, rename the parameters, and want one forward
        # for each backward, which a GAN's step is not. They overlap it with backward, though: faster over slow wires.
        value = loss.detach().clone()
        ranks.average([value, *gradients])
        norm = nn.utils.get_total_norm(gradients)
        if not math.isfinite(value):
            raise NotFiniteError(f"the loss {name!r} is {float(value)}")
        if not math.isfinite(norm):
            raise NotFiniteError(f"the gradient of the loss {name!r} has norm {float(norm)}")
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()  # or a second forward in this step would see the weights from before the update

    def update_averages(self) -> None:
        """Let every average follow its network: the step after which it is called counts."""
        for name, average in self.ema.items():
            average.update_parameters(self.nets[name])

    def weights(self) -> dict[str, Tensor]:
        """Every tensor that inference may need, by name: ``vae/…`` for networks, ``ema.vae/…`` for their averages."""
        return {f"{name}/{key}": value for name, net in self._modules() for key, value in net.state_dict().items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """The inverse of ``weights``: every tensor must find its place."""
        if unused := sorted(set(weights) - set(self.weights())):
            raise CourseError(f"the weights hold {unused[0]!r}, for which this state has no place: build it alike")
        for name, net in self._modules():
            prefix = f"{name}/"
            net.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})

    def _modules(self) -> list[tuple[str, nn.Module]]:
        return [*self.nets.items(), *((f"ema.{name}", average) for name, average in self.ema.items())]

    def training(self) -> dict:
        """What only a resumed run needs: the optimizers' state, the step and the history."""
        return {
            "step": self.step_count,
            "history": {name: torch.tensor(values, dtype=torch.float64) for name, values in self.history.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }

    def load_training(self, training: Mapping, *, keep_settings: bool = False) -> None:
        """The inverse of ``training``; with ``keep_settings`` learning rates and the like stay as they are now."""
        if sorted(training["optimizers"]) != sorted(self.optimizers):
            raise CourseError(
                f"the saved run has the optimizers {sorted(training['optimizers'])}, this one "
                f"{sorted(self.optimizers)}: choose another out"
            )
        self.step_count = training["step"]
        self.history = {name: values.tolist() for name, values in training["history"].items()}
        for name, optimizer in self.optimizers.items():
            now = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(training["optimizers"][name])
            for parameter, moments in optimizer.state.items():
                for key, value in moments.items():  # fused optimizers go through memory, whatever the order in it
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        moments[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            if keep_settings:
                for group, settings in zip(optimizer.param_groups, now, strict=True):
                    group.update(settings)

    def settings(self) -> dict[str, list[dict[str, str]]]:
        """The optimizers' settings (learning rates and the like) in words, to be compared and kept with a run."""
        return {
            name: [{k: repr(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            for name, optimizer in self.optimizers.items()
        }
