"""Tables, plots, the HTML page and the model card: all that is shown of results."""
