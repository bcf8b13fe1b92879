"""Few-shot tasks: samplers and data sets. Images leave a sampler as float32 in [0, 1] with ink = 1."""

from theria.data.augment import Augment
from theria.data.cache import cache_dir
from theria.data.classes import ClassDataset
from theria.data.digits import load_digits
from theria.data.episodes import Episode, EpisodeSampler, TaskSource
from theria.data.glyphs import glyph_counts, load_glyphs
from theria.data.omniglot import load_omniglot, omniglot_one_shot_runs
from theria.data.synthetic import LinearRegression, Sinusoid

__all__ = [
    "Augment",
    "ClassDataset",
    "Episode",
    "EpisodeSampler",
    "LinearRegression",
    "Sinusoid",
    "TaskSource",
    "cache_dir",
    "glyph_counts",
    "load_digits",
    "load_glyphs",
    "load_omniglot",
    "omniglot_one_shot_runs",
]
