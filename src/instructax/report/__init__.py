"""One self-contained HTML page from a run folder.

``folder`` reads what lies there, ``figures`` turns it into words and tables, ``plots`` draws inline
SVG, ``sections`` chooses what each section shows, ``page`` fills ``page.html.j2``. Nothing here
trains, samples or judges: a figure that no stage has measured is shown as "not measured".
"""
