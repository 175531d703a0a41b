"""A policy in a simulator or on a robot: episodes, execution of chunks, simulator processes, records, videos."""
