"""State and time: the decode loop, its strategies, and the stream of records that comes out."""
