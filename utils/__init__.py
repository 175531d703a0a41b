"""Configuration, Parquet and small helpers; imports nothing else of this repository."""
