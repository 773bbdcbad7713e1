"""From settings to rows: sources, formats, splits, mixtures, tokenizers, token streams, packing and objectives."""

from graft.data.corpus import AnyCorpus, Corpus, MixedCorpus, has_dev, nearest_ref, open_corpus, problems, split_ref
from graft.data.settings import SPLITS, DataSettings, Mixture, Source, parse
from graft.data.sources import misread

__all__ = [
    "SPLITS",
    "AnyCorpus",
    "Corpus",
    "DataSettings",
    "MixedCorpus",
    "Mixture",
    "Source",
    "has_dev",
    "misread",
    "nearest_ref",
    "open_corpus",
    "parse",
    "problems",
    "split_ref",
]
