"""GPT-2 for one more token a row: what ``GPT2.hidden`` computes, without what modules and checks cost at each call.

A model of twelve layers calls 137 modules for a token. Where memory gives its weights within five milliseconds, that is
a fifth of the time; for the small models of this course it is most of it.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from .model import GPT2, MLP, Block, CausalSelfAttention, KVCache


class Decoder:
    """Reads on with ``model``, which must be in evaluation mode and ``plain``."""

    def __init__(self, model: GPT2):
        self.n_head, self.norm_f = model.config.n_head, self._norm(model.ln_f)
        self.tokens, self.positions = model.wte.weight, model.wpe.weight
        self.layers = [
            (
                self._norm(block.ln_1), block.attn.qkv.forward, block.attn.proj.forward,
                self._norm(block.ln_2), block.mlp.fc.forward, block.mlp.proj.forward,
            )
            for block in model.blocks
        ]  # fmt: skip

    @staticmethod
    def plain(model: GPT2) -> bool:
        """Whether ``model`` computes as here: made of the course's own parts, and nothing hooked into them."""
        kinds = {(type(block), type(block.attn), type(block.mlp)) for block in model.blocks}
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        return kinds == {(Block, CausalSelfAttention, MLP)} and type(model).hidden is GPT2.hidden and not hooked

    @staticmethod
    def _norm(layer: torch.nn.LayerNorm) -> tuple:
        return layer.normalized_shape, layer.weight, layer.bias, layer.eps

    def hidden(self, ids: Int[Tensor, "b"], cache: KVCache) -> Float[Tensor, "b d"]:
        """What the last LayerNorm gives for one more token in each row; no row may have padding."""
        x = self.tokens[ids] + self.positions[cache.length]
        b, d = x.shape
        in_float32 = x.dtype == torch.bfloat16 and x.device.type == "cpu"  # as in CausalSelfAttention
        for layer, (norm_1, qkv, proj, norm_2, fc, out) in enumerate(self.layers):
            q, k, v = qkv(F.layer_norm(x, *norm_1)).view(b, 1, 3, self.n_head, -1).permute(2, 0, 3, 1, 4).unbind()
            if in_float32:
                q, k, v = q.float(), k.float(), v.float()
            y = F.scaled_dot_product_attention(q, *cache.append(layer, k, v)).to(x.dtype)
            x = x + proj(y.reshape(b, d))  # one token: heads stand side by side already
            x = x + out(F.gelu(fc(F.layer_norm(x, *norm_2)), approximate="tanh"))
        return F.layer_norm(x, *self.norm_f)
