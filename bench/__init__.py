"""What benchmark.py measures with: contenders, the plain transcription of the paper, agreement of number formats."""
