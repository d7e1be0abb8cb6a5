"""Export datasets and teacher outputs in the format of the released DLLM2Rec program."""
