"""What the tools do, importable: ordinary arguments, ordinary exceptions."""
