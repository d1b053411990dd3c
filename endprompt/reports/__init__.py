"""From result files to pages: tables, pictures, comparisons over seeds, and the paper's figures beside ours.

In come run folders and ``paper.yaml``.  Out go Markdown, CSV, JSON and PNG, also between the markers of pages
that people write.

Do not touch lightly: figures in ``paper.yaml``, which are as printed, and the markers.  No model is run here.
"""
