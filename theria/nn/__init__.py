"""Modules that can be differentiated twice: under `functional_call`, `vmap` over parameters and tasks, `jvp(grad)`."""

from theria.nn.attention import MultiheadAttention
from theria.nn.classifier import TransformerClassifier
from theria.nn.convnet import ConvNet4
from theria.nn.embedding import ConvStem, PatchEmbedding
from theria.nn.equilibrium import DeepEquilibrium, EquilibriumBlock
from theria.nn.in_context import ContextTransformer, InContextClassifier, InContextRegressor
from theria.nn.mlp import MLP
from theria.nn.norm import BatchNorm2d, LayerNorm
from theria.nn.prototype_transformer import PrototypeTransformer
from theria.nn.residual import GroupNorm, ResidualNet, ResidualStem, residual_net
from theria.nn.transformer import Transformer, TransformerBlock

__all__ = [
    "MLP",
    "BatchNorm2d",
    "ContextTransformer",
    "ConvNet4",
    "ConvStem",
    "DeepEquilibrium",
    "EquilibriumBlock",
    "GroupNorm",
    "InContextClassifier",
    "InContextRegressor",
    "LayerNorm",
    "MultiheadAttention",
    "PatchEmbedding",
    "PrototypeTransformer",
    "ResidualNet",
    "ResidualStem",
    "Transformer",
    "TransformerBlock",
    "TransformerClassifier",
    "residual_net",
]
