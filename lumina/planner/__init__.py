"""From a budget to a plan: what a run costs and reaches, told before it begins and held against it afterwards."""
