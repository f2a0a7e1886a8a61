"""Pipelines: evaluate, gate, promote, roll back, batch; the papermill notebooks behind them and the command line."""
