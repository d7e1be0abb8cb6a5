"""Writes what the released DLLM2Rec program reads, so that it trains on our data and teachers unchanged."""
