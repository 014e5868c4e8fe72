"""All rows, in the order of the page."""

from flashtile.bench.paper import folding, images, kernels, language

ROWS = {row.name: row for row in (*language.ROWS, *images.ROWS, *folding.ROWS, *kernels.ROWS)}
