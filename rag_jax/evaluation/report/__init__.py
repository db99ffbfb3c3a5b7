"""Pages and pictures of an evaluation, for people to read.

`write_report` writes all of them into a directory; `markdown` is the one page of a run, `html` a page to browse
answers, from `templates`; `evaluation_plots` and `training_plot` draw.
"""
