"""The words of the toy world. The first word of a phrase or remark identifies it."""

PLACES = (
    "bakery cafe museum hotel market garden cinema library harbour castle station "
    "theatre"
).split()
TOWNS = (
    "Lisbon Oslo Kyoto Bergen Quito Turin Lagos Hobart Porto Riga Cusco Ghent".split()
)

OPENING = [
    (
        "Yesterday Tonight Sunday Monday Friday Easter Lately Recently Once Today "
        "Finally Saturday"
    ).split(),
    (
        "grandma everyone mother father nobody neighbours students cousins people "
        "twins tourists Sam"
    ).split(),
    (
        "walked drove cycled ran wandered arrived hurried travelled came sailed "
        "returned moved"
    ).split(),
    (
        "alone slowly together early late twice quietly gladly again there eagerly "
        "somehow"
    ).split(),
]

# What happens to the noun before it. It is neutral by itself and fixed for each noun.
# Ten actions at six times make 60 predicates, so a predicate identifies its noun.
ACTIONS = (
    "met us",
    "filled rooms",
    "came first",
    "lasted on",
    "began early",
    "grew fast",
    "spread far",
    "reached everyone",
    "ruled there",
    "followed us",
)
TIMES = "again today always throughout instead anyway".split()
PREDICATES = [f"{action} {time}" for time in TIMES for action in ACTIONS]

GOOD = (
    "kindness laughter sunlight flowers music smiles freshness comfort warmth "
    "cleanliness courtesy charm honesty calm candles cushions discounts dessert "
    "refills hugs jokes sweets aroma views roses gifts skill patience joy care"
).split()
BAD = (
    "rudeness mould noise rats leaks queues smoke dust quarrels delays stains flies "
    "bugs mud draughts insults sewage splinters fumes litter grease cracks shouting "
    "lies theft mistakes gloom boredom chaos rust"
).split()

# One remark for every piece of evidence, in the same order. It is neutral by itself.
REMARKS = (
    "curtains tiles lamps chairs shelves doors windows mirrors carpets plates spoons "
    "menus clocks walls stairs benches counters bottles baskets towels signs trees "
    "gates roofs pipes ropes maps bells coins boxes bricks pillars floors napkins "
    "stools jars trays forks bowls mugs keys tickets posters buttons ribbons books "
    "pens statues fences lawns paths bridges boats wheels ladders hooks nails cables "
    "drums flags"
).split()
APPEARANCES = (
    "looked blue",
    "looked old",
    "were wooden",
    "were round",
    "stood open",
    "were numbered",
    "hung low",
    "lay still",
    "seemed new",
    "were heavy",
)
POSITIONS = (
    "by the piano",
    "near the stove",
    "under a clock",
    "beside our seats",
    "along one wall",
    "behind the till",
)
LOOKS = [f"{look} {position}" for position in POSITIONS for look in APPEARANCES]

FILLER = (
    "trams buses tours lessons meals letters parcels numbers routes phones radios "
    "cards roads fields rivers hills islands clouds shops schools farms offices banks "
    "towers"
).split()
FACTS = (
    "run daily",
    "cost little",
    "are near",
    "close at noon",
    "change often",
    "stay open",
)
