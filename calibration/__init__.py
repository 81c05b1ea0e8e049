"""WHAT THE MODEL SEES: text into token windows, the model's own traces, and the statistics of both."""
