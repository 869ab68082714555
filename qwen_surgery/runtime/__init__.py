"""The vendor's runtimes, followed call by call.

``memory`` says where each net's tensors lie, ``flows`` what each generation of demos does with them: which
arrays it writes, copies and launches, and in which order. A flow runs on a machine: ``device`` is the
vendor's own bmruntime on the emulated chip, ``hazards`` keeps no numbers and notices what overwrites what.
"""
