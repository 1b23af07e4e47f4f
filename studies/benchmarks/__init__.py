"""What ``studies.benchmark`` measures: one module a subcommand, with ``add_arguments(parser)`` and ``run(args)``."""
