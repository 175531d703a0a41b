"""From Parquet files and camera frames to the batch that the model reads; imports only utils/."""
