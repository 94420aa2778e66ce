"""FlowTransformer: the wiring of both blocks, the convolutional encoder, the plain attention."""

from __future__ import annotations

from effformer.models.layouts.flowtransformer import ATTENTION, decoder_layout, encoder_layout
from harness import Golden

import effformer
from effformer.attention import Attention
from effformer.blocks import Block, FlowTransformerDecoder, FlowTransformerEncoder
from effformer.context import EMPTY
from effformer.ffn import MLP
from effformer.site import NormRule, Site


def check(golden: Golden) -> None:
    x = golden.tensor("in.x")
    encoder = _encoder(golden, "encoder")
    golden.assert_close(encoder(x), "out.encoder")
    golden.assert_close(encoder.attn.run(x, EMPTY), "out.encoder_attention")
    if "out.encoder_conv" in golden.tensors:
        golden.assert_close(_encoder(golden, "encoder_conv")(x), "out.encoder_conv")
    golden.assert_close(_decoder(golden)(x), "out.decoder")
    if "out.gpt3_attention" in golden.tensors:
        plain = Attention(Attention.Config(), _site(golden)).eval()
        effformer.load_weights(plain, golden.weights("gpt3_attention/"), ATTENTION)
        golden.assert_close(plain(x), "out.gpt3_attention")


def _site(golden: Golden) -> Site:
    c = golden.config
    return Site(
        dim=c["input_dimension"], heads=c["num_heads"], norm=NormRule(eps=c["layer_norm_eps"])
    )


def _ffn(golden: Golden) -> MLP.Config:
    return MLP.Config(hidden=golden.config["inner_dimension"], act="relu")


def _encoder(golden: Golden, name: str) -> Block:
    attn = Attention.Config(head_dim=golden.config["encoder_key_dim"])
    config = FlowTransformerEncoder.Config()
    block = FlowTransformerEncoder(config, _site(golden), attn=attn, ffn=_ffn(golden))
    layout = encoder_layout(golden.config["num_heads"])
    effformer.load_weights(block, golden.weights(f"{name}/"), layout)
    return block.eval()


def _decoder(golden: Golden) -> Block:
    attn = Attention.Config(head_dim=golden.config["decoder_key_dim"])
    config = FlowTransformerDecoder.Config()
    block = FlowTransformerDecoder(config, _site(golden), attn=attn, ffn=_ffn(golden))
    layout = decoder_layout(golden.config["num_heads"])
    effformer.load_weights(block, golden.weights("decoder/"), layout)
    return block.eval()
