"""Names of an analysis's files, and what the names of its figures are made of."""

from sparsekv.token_classes import TokenClass

ANALYSIS = "attention_analysis.json"
HEADS = "attention_analysis.parquet"
POSITIONS = 64  # leading positions that are told apart: enough to see where a sink ends
CLASSES = tuple(token_class.name.lower() for token_class in TokenClass)
