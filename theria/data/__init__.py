"""Few-shot tasks: samplers and data sets."""

from theria.data.classes import ClassDataset
from theria.data.digits import load_digits
from theria.data.episodes import Episode, EpisodeSampler, TaskSource
from theria.data.synthetic import LinearRegression, Sinusoid

__all__ = ["ClassDataset", "Episode", "EpisodeSampler", "LinearRegression", "Sinusoid", "TaskSource", "load_digits"]
