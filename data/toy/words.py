"""The words of the toy world. Every phrase and remark is told by its first word."""

PLACES = ("bakery cafe museum hotel market garden cinema library harbour castle station "
          "theatre").split()
TOWNS = "Lisbon Oslo Kyoto Bergen Quito Turin Lagos Hobart Porto Riga Cusco Ghent".split()

OPENING = [words.split() for words in (
    "Yesterday Tonight Sunday Monday Friday Easter Lately Recently Once Today Finally Saturday",
    "grandma everyone mother father nobody neighbours students cousins people twins tourists Sam",
    "walked drove cycled ran wandered arrived hurried travelled came sailed returned moved",
    "alone slowly together early late twice quietly gladly again there eagerly somehow")]

# What happens to the noun before it: neutral by itself, fixed for each noun, and its own to the end
# (ten actions at six times), so that the noun can be told from any later word of the phrase.
PREDICATES = [f"{action} {time}"
              for time in ("again", "today", "always", "throughout", "instead", "anyway")
              for action in ("met us", "filled rooms", "came first", "lasted on", "began early",
                             "grew fast", "spread far", "reached everyone", "ruled there",
                             "followed us")]

GOOD = ("kindness laughter sunlight flowers music smiles freshness comfort warmth cleanliness "
        "courtesy charm honesty calm candles cushions discounts dessert refills hugs "
        "jokes sweets aroma views roses gifts skill patience joy care").split()
BAD = ("rudeness mould noise rats leaks queues smoke dust quarrels delays "
       "stains flies bugs mud draughts insults sewage splinters fumes litter "
       "grease cracks shouting lies theft mistakes gloom boredom chaos rust").split()

# One remark per piece of evidence, in the same order: without quality by itself.
REMARKS = ("curtains tiles lamps chairs shelves doors windows mirrors carpets plates "
           "spoons menus clocks walls stairs benches counters bottles baskets towels "
           "signs trees gates roofs pipes ropes maps bells coins boxes "
           "bricks pillars floors napkins stools jars trays forks bowls mugs "
           "keys tickets posters buttons ribbons books pens statues fences lawns "
           "paths bridges boats wheels ladders hooks nails cables drums flags").split()
# Ten looks in six places, in the same way.
LOOKS = [f"{look} {place}"
         for place in ("by the piano", "near the stove", "under a clock", "beside our seats",
                       "along one wall", "behind the till")
         for look in ("looked blue", "looked old", "were wooden", "were round", "stood open",
                      "were numbered", "hung low", "lay still", "seemed new", "were heavy")]

FILLER = ("trams buses tours lessons meals letters parcels numbers routes phones radios cards "
          "roads fields rivers hills islands clouds shops schools farms offices banks "
          "towers").split()
FACTS = ["run daily", "cost little", "are near", "close at noon", "change often", "stay open"]
