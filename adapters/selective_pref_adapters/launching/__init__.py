"""How the processes of a run are started, meet and part, and that they are one run; for every trainer.

launcher   the environment of torchrun, deepspeed, srun or mpirun → RANK, WORLD_SIZE, …, or what is wrong with it
processes  they find one another within a limit of time, and leave before the program ends
together   one run for each output folder, one folder and the same options for all processes of a run
"""

from __future__ import annotations
