"""Programs that produce the tables of the docs: the demo, the studies, the survey of backbones, the benchmarks."""
