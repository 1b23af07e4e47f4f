"""Without training: moments of features, denoisers in closed form, and the fit to a domain."""
