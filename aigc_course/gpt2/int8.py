"""GPT-2 with linear layers of eight bits: a quarter of the time that reading them takes."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .files import GPT2Error
from .model import GPT2


class Int8Linear(nn.Module):
    """A linear layer with a weight (outputs, inputs) of whole numbers from -127 to 127, and a scale for each output.

    Inputs are rounded alike, each row with a scale of its own, so that whole numbers are multiplied: exactly on a CPU;
    elsewhere in float32, which is right and not fast. This is the "vector-wise quantization" of Dettmers et al. (2022,
    arXiv:2208.07339, section 3.1), without its outliers.
    """

    def __init__(self, weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, "outputs"] | None):
        super().__init__()
        whole, scale = quantize(weight.detach().float())
        self.register_buffer("weight", whole.t())  # (inputs, outputs), one output after the other in memory
        self.register_buffer("scale", scale[:, 0])
        self.register_buffer("bias", bias.detach().float() if bias is not None else torch.zeros_like(self.scale))

    def forward(self, x: Float[Tensor, "*n inputs"]) -> Float[Tensor, "*n outputs"]:
        whole, scale = quantize(x.float().reshape(-1, x.shape[-1]))
        multiply = torch._int_mm if x.device.type == "cpu" else lambda a, b: a.float() @ b.float()
        return torch.addcmul(self.bias, multiply(whole, self.weight) * scale, self.scale).view(*x.shape[:-1], -1)


def quantize(x: Float[Tensor, "n d"]) -> tuple[Tensor, Float[Tensor, "n 1"]]:
    """Whole numbers, as int8, and a scale for each row, whose product is ``x`` to half a scale."""
    scale = x.abs().amax(1, keepdim=True).clamp_min_(1e-30).div_(127)
    return (x / scale).round_().to(torch.int8), scale


class Int8GPT2(GPT2):
    """A copy of ``model`` for writing and judging text, its linear layers in int8; it is neither trained nor saved.

    The embeddings stay in float32, that of the tokens beside the head made of it. How much the perplexity differs is a
    matter of the model: measure it.
    """

    def __init__(self, model: GPT2):
        super().__init__(model.config, None)
        self.load_state_dict({k: v.detach().float().clone() for k, v in model.state_dict().items()}, assign=True)
        self.head = Int8Linear(self.wte.weight, None)
        for block in self.blocks:
            for part, name in ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc"), (block.mlp, "proj")):
                layer = getattr(part, name)
                setattr(part, name, Int8Linear(layer.weight, layer.bias))
        self.eval().requires_grad_(False)

    def logits(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        return self.head(hidden)

    def save_pretrained(self, folder) -> None:
        raise GPT2Error(f"{folder}: int8 weights are not saved: save the model that they were made from")
