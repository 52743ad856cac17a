"""What a run takes, from configurations alone: `selective-pref plan`.

options   the flags
sizes     config.json → numbers of parameters, bytes of activations; no weight is read or made
memory    sizes and settings → bytes on a device, on a host and on disk, and what to change where they do not fit
command   a table, or JSON
"""

from __future__ import annotations
