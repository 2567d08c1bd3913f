"""The report: one self-contained HTML page and its pictures. ``page.write_report`` makes it, ``content.ReportContent`` is what goes in."""
