"""One module for each task; importing it registers the data sets, models and metrics of the task."""
