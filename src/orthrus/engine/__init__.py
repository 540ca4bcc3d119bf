"""State and time: the engine and its decode loop, the strategies, and the streams of records."""
