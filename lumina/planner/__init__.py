"""A budget, a model and data go in; what comes out is a forecast (fits or not, how long, what loss) and, after the run,
how right it was. No torch."""
