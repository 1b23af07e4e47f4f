"""What makes the tables of the pages: the demo, the studies, the survey of backbones, the benchmarks."""
