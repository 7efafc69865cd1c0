"""Figures of what `jlora.analysis` finds and `jlora.rank` decides, in one style.

    figure = jlora.plot.similarity(grid)          # every function returns the figure it drew on
    jlora.plot.save(figure, "phi")                # phi.png and phi.svg

Every function takes an axis (`ax=`) to draw on, one of `panels`' or any other, and makes a figure without. Needs
matplotlib: `pip install 'jlora[plot]'`; it is imported when the first figure is drawn. pyplot is left alone: no window,
no global figure, and no setting changes outside of these functions.

Colours are those of Okabe and Ito, `Color Universal Design <https://jfly.uni-koeln.de/color/>`_, 2008, told apart by
colour-blind readers and, by markers and hatches beside them, in print without colour; heat maps are cividis (Nunez et
al, `Optimizing colormaps <https://arxiv.org/abs/1712.01662>`_, 2017).
"""

from jlora.plot._style import COLOURS as COLOURS
from jlora.plot._style import HATCHES as HATCHES
from jlora.plot._style import HEIGHT as HEIGHT
from jlora.plot._style import MARKERS as MARKERS
from jlora.plot._style import STYLE as STYLE
from jlora.plot._style import WIDTH as WIDTH
from jlora.plot._style import panels as panels
from jlora.plot._style import save as save
from jlora.plot.layers import allocation as allocation
from jlora.plot.layers import ranks as ranks
from jlora.plot.runs import curves as curves
from jlora.plot.runs import pareto as pareto
from jlora.plot.runs import scores as scores
from jlora.plot.runs import sweep as sweep
from jlora.plot.subspaces import amplification as amplification
from jlora.plot.subspaces import similarity as similarity
from jlora.plot.subspaces import spectra as spectra
