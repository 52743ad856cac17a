"""Columns → rows: a dozen schemas of preference pairs, and those of a prompt and one answer.

readers      which columns a schema has, and where prompt and answers stand in them
recognise    which schema a row has; what might lose a prompt is an error
"""

from selective_pref_adapters.pairs.schemas.recognise import Columns, parse_columns, preference_row

__all__ = ["Columns", "parse_columns", "preference_row"]
