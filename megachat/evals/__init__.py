"""How good a run's models are, with the uncertainty of every number, and the page that says so.

In reading order: score (a number with its interval), recall, wins, bits, answers (asking a model many
questions at once), evaluate (a stage); markup, plots, page (with page.css), report (a stage).
"""
